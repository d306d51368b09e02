"""stub"""


class Compatibility:
    def ran(self, mix):
        pass
